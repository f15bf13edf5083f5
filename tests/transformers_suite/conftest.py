"""pytest's marks in transformers' tests, which `--strict-markers` wants declared."""

MARKS = ["accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"]


def pytest_configure(config):
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: a mark of transformers' own tests")

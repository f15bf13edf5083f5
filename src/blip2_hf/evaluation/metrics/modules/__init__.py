"""One folder for each metric, as `evaluate` loads them; see [`~evaluation.metrics.load_metric`]."""

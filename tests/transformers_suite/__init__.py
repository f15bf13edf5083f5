"""transformers' own test mixins, run on our models.

package.py     fetches the tests of the installed transformers from its source package and makes them importable
testers.py     tiny configs and inputs, for our classes or transformers' own (`family`)
suites.py      the mixins with what BLIP-2 needs changed, for any family
test_*.py      the suites on our classes; test_baseline.py (slow) counts them against transformers' own BLIP-2
"""

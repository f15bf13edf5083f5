"""
The models, the processor and the pipelines. These files lie flat and import nothing from outside this folder, because
a model on the Hub carries copies of those that it needs.
"""

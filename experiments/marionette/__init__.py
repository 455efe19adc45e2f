"""The training of the embedded model, stage by stage; `python -m experiments.marionette.train` is the command."""

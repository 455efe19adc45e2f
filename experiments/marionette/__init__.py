"""The training of the embedded model, stage by stage; `python -m experiments.train_marionette` is the command."""

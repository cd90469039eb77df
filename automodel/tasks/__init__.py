"""The kinds of model that recipes train, a file each; ``task.py`` says what a kind must answer."""

"""The engine: training loop, evaluation, prediction, plots and loggers; models and data come in as values."""

"""Files of models, series and plots, and the training of models in a process of its own."""

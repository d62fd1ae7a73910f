"""One recipe, one loop: training, evaluation and the folders that runs leave behind."""

"""What a model costs, on paper and on the clock."""

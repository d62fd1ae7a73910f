"""What a person looks at: pictures of tokens, plots, reports."""

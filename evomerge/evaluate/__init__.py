"""Tasks, scorers and statistics: from completions to a fitness with its error bar."""

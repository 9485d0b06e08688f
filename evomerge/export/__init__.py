"""What a finished run leaves behind: recipe, mergekit YAML, model folder."""

"""Options of commands: fields with help texts, and the way to them from flags and recipes, and their help."""

"""Options of commands: fields with help texts, and their way from flags and recipes."""

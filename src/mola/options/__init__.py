"""Options of commands: dataclass fields, flags, recipes and help texts."""

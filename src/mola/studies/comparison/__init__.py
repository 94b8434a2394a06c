"""What `mola compare` is made of: recipes x tasks x seeds, their record, statistics and tables."""

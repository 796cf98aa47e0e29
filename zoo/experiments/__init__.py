"""Recipes, the whole zoo, the tables of the paper and the generated pages; they need a checkout."""

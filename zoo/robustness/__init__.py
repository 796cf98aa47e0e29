"""Attacks, what they find of each image, signs of masked gradients, and the report of it all."""

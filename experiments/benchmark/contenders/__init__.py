"""What is compared: one module for each framework of this project and of transformers."""

"""Which key blocks each query block reads: layouts, how they are made, and what follows from them."""

"""Linear algebra that knows no manifold: dense functions, and products of large matrices with thin ones."""

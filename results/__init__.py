"""Published cells, and numbers from the papers (`papers/`); a package, so that a wheel has them."""

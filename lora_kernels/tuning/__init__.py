"""Which kernel form runs a shape: measured tables, shipped as JSON, and the search that writes them."""

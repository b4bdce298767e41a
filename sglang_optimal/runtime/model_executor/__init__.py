"""What touches a model runner: graphs, weights, failures."""

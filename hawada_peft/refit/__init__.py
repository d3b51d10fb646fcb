"""A slim model's weights fitted to the dense model in closed form, or nearly so."""

"""All services as they are, on workers whose device is a clock."""

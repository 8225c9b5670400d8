"""Released checkpoints to engines: read, export, compile, verify."""

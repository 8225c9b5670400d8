"""The networks as torch modules, shaped for export: every state is an explicit input and output."""

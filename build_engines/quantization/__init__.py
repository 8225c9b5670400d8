"""Post-training quantisation of the DiT to fp8: calibration over real passes, choices by measured error, Q/DQ nodes."""

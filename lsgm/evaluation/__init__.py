"""What a trained model is worth: NELBO, Fréchet distance, tables and figures."""

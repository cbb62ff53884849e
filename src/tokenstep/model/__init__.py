"""The stages of the model, one file each, in the order of the data flow."""

"""Pictures, labels and labelled folders: read, checked, augmented, drawn upon."""

"""Pictures in, label maps out: files, windows over large pictures, the page."""

"""Label a corpus: find and decode clips, label them in windows, and write the labels to a file that can grow."""

"""Images: the data sets, the reading of image folders, and the loading of batches."""

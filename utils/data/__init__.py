"""The data room: what is on the user's disk, read as it is and never changed, up to the batches that training sees."""

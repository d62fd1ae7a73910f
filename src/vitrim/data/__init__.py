"""Images: the one door through which they come. Decoding, input format, transforms, streams and seeds."""

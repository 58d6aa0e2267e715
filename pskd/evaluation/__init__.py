"""The measures of a network, or of predictions in a file, with intervals: `pskd evaluate`."""

"""A DICOMweb archive as a store of images and labels."""

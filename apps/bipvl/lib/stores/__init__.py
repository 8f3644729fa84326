"""Where images and labels live: a folder of studies, or a DICOM archive."""

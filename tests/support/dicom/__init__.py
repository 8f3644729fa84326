"""What tests of DICOM share: archives, made-up series, and stores on both."""

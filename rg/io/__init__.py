"""What is read from files and written to them: whole files, images, figures."""

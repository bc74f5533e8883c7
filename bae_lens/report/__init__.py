"""What a person sees: figures, pictures, pages. The only room that plots."""

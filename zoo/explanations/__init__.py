"""Why a network answers as it does: the linear map that it is for an image, and the maps of its layers."""

"""Corrupted images: noise, blur, weather, digital artefacts and bad light."""

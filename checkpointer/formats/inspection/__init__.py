"""Looks into payloads without unpickling them."""

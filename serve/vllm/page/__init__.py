"""The page `/depth` of the server: chat whose tokens are coloured by their recurrences, and the engine's counters.

    routes.py    /depth and its files, which need no key, and /v1/depth, the settings that a model offers

Beside it stand the files that the browser gets: `page.html`, `page.css`, `page.js` and `icon.svg`. Nothing builds them,
and they fetch nothing from elsewhere.
"""

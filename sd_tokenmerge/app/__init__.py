"""The app: pictures of one prompt in a browser, unmerged and merged; needs gradio."""

TITLE = "Runs"


def build(context):
    import gradio as gr

    gr.Markdown("runs")

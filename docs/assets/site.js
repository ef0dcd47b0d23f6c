// Sets the equations of each page. arithmatex has put them between \( and \), or \[ and \].
document$.subscribe(({ body }) => {
  for (const equation of body.querySelectorAll(".arithmatex")) {
    renderMathInElement(equation, {
      delimiters: [
        { left: "\\(", right: "\\)", display: false },
        { left: "\\[", right: "\\]", display: true },
      ],
    });
  }
});

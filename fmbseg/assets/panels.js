// Sections of captioned pictures side by side. A click on a picture sets `point` to [x, y] in [0, 1] from its top left.

const element = (tag, name) => Object.assign(document.createElement(tag), { className: name });

// As many children as wanted: those that are there stay, so that nothing flickers.
const fit = (parent, count, make) => {
  while (parent.children.length > count) parent.lastChild.remove();
  while (parent.children.length < count) parent.append(make());
  return [...parent.children];
};

const percent = (value) => `${100 * value}%`;

const place = (mark, x, y) => {
  mark.style.left = percent(x);
  mark.style.top = percent(y);
};

function makeSection() {
  const section = element("section", "fmbseg-section");
  section.append(element("h4", ""), element("div", "fmbseg-row"));
  return section;
}

function makePanel(choose) {
  const panel = element("figure", "fmbseg-panel");
  const frame = element("div", "fmbseg-frame");
  const picture = element("img", "");
  picture.draggable = false;
  frame.append(picture, element("div", "fmbseg-marks"));
  frame.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    const inside = (value) => Math.min(Math.max(value, 0), 1);
    if (box.width) choose(inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height));
  });
  panel.append(frame, element("figcaption", ""), element("ul", "fmbseg-legend"));
  return panel;
}

function drawMarks(layer, panel) {
  layer.replaceChildren();
  panel.boxes.forEach(([x, y, width, height, name], i) => {
    const box = element("div", "fmbseg-box");
    place(box, x, y);
    box.style.width = percent(width);
    box.style.height = percent(height);
    const label = element("span", "");
    label.textContent = name;
    label.style.transform = `translateY(${16 * ((i % 3) - 1)}px)`; // neighbours' names lie in different lines
    if (name) box.append(label);
    layer.append(box);
  });
  for (const [x, y] of panel.stars) {
    const star = element("div", "fmbseg-star");
    star.textContent = "★";
    place(star, x, y);
    layer.append(star);
  }
  if (panel.cross) {
    const cross = element("div", "fmbseg-cross");
    place(cross, ...panel.cross);
    layer.append(cross);
  }
}

function drawPanel(node, panel, clickable) {
  const [frame, caption, legend] = node.children;
  const [picture, marks] = frame.children;
  node.style.width = `${panel.width}px`;
  node.dataset.title = panel.title;
  node.classList.toggle("fmbseg-chosen", panel.chosen);
  frame.classList.toggle("fmbseg-clickable", clickable);
  frame.hidden = !panel.src;
  if (picture.src !== panel.src) picture.src = panel.src;
  picture.alt = panel.title;
  drawMarks(marks, panel);
  const title = element("strong", "");
  title.textContent = panel.title;
  caption.replaceChildren(title, ` ${panel.note}`);
  const entries = fit(legend, panel.legend.length, () => {
    const entry = element("li", "");
    entry.append(element("i", ""), element("span", ""));
    return entry;
  });
  entries.forEach((entry, i) => {
    entry.firstChild.style.background = panel.legend[i][1];
    entry.lastChild.textContent = panel.legend[i][0];
  });
}

function render({ model, el }) {
  el.classList.add("fmbseg-panels");
  const choose = (x, y) => {
    if (!model.get("clickable")) return;
    model.set("point", [x, y]);
    model.save_changes();
  };
  const draw = () => {
    const sections = model.get("sections");
    fit(el, sections.length, makeSection).forEach((node, i) => {
      const [title, row] = node.children;
      title.textContent = sections[i].title;
      const panels = sections[i].panels;
      fit(row, panels.length, () => makePanel(choose)).forEach((panel, j) => drawPanel(panel, panels[j], model.get("clickable")));
    });
  };
  model.on("change:sections", draw);
  draw();
  return () => model.off("change:sections", draw);
}

export default { render };

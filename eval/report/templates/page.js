"use strict";

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const byId = (id) => document.getElementById(id);

// ------------------------------------------------------------------------------------------------ tables

const valueOf = (row, column) => {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
};

const compare = (a, b) => {
  if (a === "" || b === "") return 0; // sorted apart: the end in either order
  if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a < b ? -1 : 1;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
};

const parseValues = (cells) => {
  for (const cell of cells) cell.dataset.value = cell.dataset.value.replace("inf", "Infinity");
};

const sortable = (table) => {
  const [head] = table.tHead.rows;
  const [body] = table.tBodies;
  parseValues(body.querySelectorAll("[data-value]"));
  [...head.cells].forEach((header, column) => {
    const button = element("button", { type: "button", textContent: header.textContent });
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = header.getAttribute("aria-sort") !== "ascending";
      for (const cell of head.cells) cell.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const filled = [];
      const empty = [];
      for (const row of body.rows) (valueOf(row, column) === "" ? empty : filled).push(row);
      filled.sort((a, b) => (rising ? 1 : -1) * compare(valueOf(a, column), valueOf(b, column)));
      body.append(...filled, ...empty);
    });
  });
};

document.querySelectorAll("table.sortable").forEach(sortable);

// ---------------------------------------------------------------------------------------------- examples

const TOLERANCE = 0.1; // of the rate; points further off are marked
const SPACE = "\u00a0"; // between a figure and its unit
const viewer = JSON.parse(byId("viewer").textContent);

/** Item, rate and codecs chosen; `show(example, versions)` is called whenever they change. */
const matched = (show) => {
  const hidden = new Set();
  const target = byId("target");
  let current = null;

  const rate = () => current.rates[target.value];
  const aim = (wanted) => {
    const distances = current.rates.map((each) => Math.abs(Math.log(each / wanted)));
    target.value = distances.indexOf(Math.min(...distances));
  };
  const nearest = (wanted) => {
    const found = new Map();
    current.versions.forEach((version, index) => {
      const distance = Math.abs(Math.log(version.rate / wanted));
      const best = found.get(version.codec);
      if (!best || distance < best.distance) found.set(version.codec, { ...version, index, distance });
    });
    return [...found.values()].filter((version) => !hidden.has(version.codec));
  };
  const update = () => {
    const wanted = rate();
    const text = `${wanted.toPrecision(3)}${SPACE}${viewer.unit}`;
    byId("target-value").textContent = text;
    target.setAttribute("aria-valuetext", text);
    const versions = nearest(wanted);
    for (const version of versions) version.deviation = version.rate / wanted - 1;
    show(current, versions);
  };
  const choose = () => {
    const wanted = current && rate();
    const index = Number(byId("item").value);
    current = { ...viewer.examples[index], index };
    const part = current.seconds
      ? `Spectrograms: 0 to ${current.frequency / 1000}${SPACE}kHz upward, ${current.seconds.toFixed(1)}${SPACE}s, 90${SPACE}dB.`
      : "";
    byId("part").textContent = [current.note && `Shown: ${current.note}.`, part].filter(Boolean).join(" ");
    const titles = new Map(current.versions.map((version) => [version.codec, version.title]));
    byId("choice").replaceChildren(
      byId("choice").firstElementChild,
      ...[...titles].map(([codec, title]) => {
        const box = element("input", { type: "checkbox", checked: !hidden.has(codec) });
        box.addEventListener("change", () => {
          if (box.checked) hidden.delete(codec);
          else hidden.add(codec);
          update();
        });
        return element("label", {}, box, title);
      }),
    );
    target.max = current.rates.length - 1;
    if (wanted) aim(wanted);
    else target.value = Math.round(target.max / 3);
    update();
  };
  byId("item").addEventListener("change", choose);
  target.addEventListener("input", update);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  choose();
};

const source = (example, version, kind) =>
  byId(`media-${example.index}`).content.querySelector(`${kind}[data-version="${version}"]`).getAttribute("src");

const caption = (version) => {
  if (!version) return element("figcaption", {}, element("strong", { textContent: "original" }));
  const off = Math.abs(version.deviation) > TOLERANCE;
  const percent = `${version.deviation < 0 ? "" : "+"}${(100 * version.deviation).toFixed(0)}${SPACE}%`;
  return element(
    "figcaption",
    {},
    element("strong", { textContent: version.title }),
    ` quality ${version.quality}, ${version.rate.toPrecision(3)}${SPACE}${viewer.unit} `,
    element("span", { className: off ? "off" : "", textContent: `(${percent})` }),
    element("br"),
    ...version.figures.flatMap((figure, place) => [place ? ", " : "", element("span", { textContent: figure })]),
  );
};

const words = (version) =>
  version
    ? `${version.title}, quality ${version.quality}, ${version.rate.toPrecision(3)} ${viewer.unit}`
    : "original";

// ---------------------------------------------------------------------------------------------- pictures

const pictures = () => {
  const stage = byId("stage");
  const panes = byId("panes");
  const overview = byId("whole");
  const whole = element("img", { alt: "the whole picture", draggable: false });
  overview.prepend(whole);
  const frame = byId("window");
  const zoom = byId("zoom");
  const flip = byId("flip");
  const loaded = new Map(); // of the item shown: pictures by version
  let item = -1;
  let shown = []; // { canvas, version }
  let center = null; // pixels of the picture
  let held = false;

  const load = (example, version) => {
    if (!loaded.has(version)) {
      const image = new Image();
      image.src = source(example, version, "img");
      image.decode().then(draw);
      loaded.set(version, image);
    }
    return loaded.get(version);
  };
  const original = () => loaded.get("original");
  const size = () => ({ width: original().naturalWidth, height: original().naturalHeight });

  const clamp = (canvas) => {
    const { width, height } = size();
    const inside = (value, extent, length) =>
      extent >= length ? length / 2 : Math.min(Math.max(value, extent / 2), length - extent / 2);
    center.x = inside(center.x, canvas.clientWidth / zoom.value, width);
    center.y = inside(center.y, canvas.clientHeight / zoom.value, height);
  };

  const paint = (canvas, image) => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const scale = Math.max(1, Math.round(zoom.value * ratio)); // whole, so that all pixels are of one size
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.setTransform(
      scale, 0, 0, scale,
      Math.round(canvas.width / 2 - scale * center.x),
      Math.round(canvas.height / 2 - scale * center.y),
    );
    if (image.complete && image.naturalWidth) context.drawImage(image, 0, 0);
  };

  function draw() {
    byId("zoom-value").textContent = `${zoom.value}x`;
    if (!shown.length || !original().complete || !original().naturalWidth) return;
    const { width, height } = size();
    center ??= { x: width / 2, y: height / 2 };
    clamp(shown[0].canvas);
    const same = flip.getAttribute("aria-pressed") === "true";
    for (const { canvas, version } of shown) paint(canvas, loaded.get(same ? "original" : version));
    const { clientWidth, clientHeight } = shown[0].canvas;
    const factor = whole.clientWidth / width;
    const extent = { x: Math.min(clientWidth / zoom.value, width), y: Math.min(clientHeight / zoom.value, height) };
    Object.assign(frame.style, {
      left: `${(center.x - extent.x / 2) * factor}px`,
      top: `${(center.y - extent.y / 2) * factor}px`,
      width: `${extent.x * factor}px`,
      height: `${extent.y * factor}px`,
    });
  }

  const show = (example, versions) => {
    if (example.index !== item) {
      item = example.index;
      loaded.clear();
      center = null;
      held = false;
      stage.classList.remove("held");
      whole.src = source(example, "original", "img");
    }
    load(example, "original");
    shown = [null, ...versions].map((version) => {
      const canvas = element("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", words(version));
      const name = version ? version.index : "original";
      load(example, name);
      return { canvas, version: name, figure: element("figure", {}, canvas, caption(version)) };
    });
    panes.replaceChildren(...shown.map(({ figure }) => figure));
    draw();
  };

  const move = (x, y) => {
    if (!center) return;
    center.x += x;
    center.y += y;
    draw();
  };
  const zoomTo = (value) => {
    zoom.value = value;
    draw();
  };
  const toggle = () => {
    flip.setAttribute("aria-pressed", String(flip.getAttribute("aria-pressed") !== "true"));
    draw();
  };
  const point = (event) => {
    const box = whole.getBoundingClientRect();
    if (!center || !box.width) return;
    const factor = size().width / box.width;
    center = { x: (event.clientX - box.left) * factor, y: (event.clientY - box.top) * factor };
    draw();
  };

  overview.addEventListener("pointermove", (event) => {
    if (!held || event.pointerType === "touch") point(event);
  });
  overview.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch") overview.setPointerCapture(event.pointerId);
    else held = !held;
    stage.classList.toggle("held", held);
    point(event);
  });
  whole.addEventListener("load", draw);

  let grip = null; // where a pane is held by the pointer
  panes.addEventListener("pointerdown", (event) => {
    if (event.target.tagName !== "CANVAS" || event.pointerType === "touch" || event.button) return;
    event.target.setPointerCapture(event.pointerId);
    grip = { x: event.clientX, y: event.clientY };
  });
  panes.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const by = { x: (grip.x - event.clientX) / zoom.value, y: (grip.y - event.clientY) / zoom.value };
    grip = { x: event.clientX, y: event.clientY };
    move(by.x, by.y);
  });
  for (const kind of ["pointerup", "pointercancel"]) panes.addEventListener(kind, () => (grip = null));

  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !shown.length) return;
    const step = event.shiftKey ? 1 : shown[0].canvas.clientWidth / zoom.value / 8;
    const actions = {
      ArrowLeft: () => move(-step, 0),
      ArrowRight: () => move(step, 0),
      ArrowUp: () => move(0, -step),
      ArrowDown: () => move(0, step),
      "+": () => zoomTo(Number(zoom.value) + 1),
      "=": () => zoomTo(Number(zoom.value) + 1),
      "-": () => zoomTo(Number(zoom.value) - 1),
      o: toggle,
      O: toggle,
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  });
  zoom.addEventListener("input", draw);
  flip.addEventListener("click", toggle);
  new ResizeObserver(draw).observe(stage);
  matched(show);
};

// ------------------------------------------------------------------------------------------------ sounds

const sounds = () => {
  const panes = byId("panes");
  let item = -1;
  let position = 0; // seconds into the part, where the next version goes on
  let playing = null; // codec whose sound is heard; "" for the original

  const player = (example, version) => {
    const name = version ? version.index : "original";
    const codec = version ? version.codec : "";
    const audio = element("audio", { controls: true, preload: "none", src: source(example, name, "audio") });
    audio.setAttribute("aria-label", words(version));
    audio.addEventListener("play", () => {
      for (const other of panes.querySelectorAll("audio")) if (other !== audio) other.pause();
      if (playing !== codec) audio.currentTime = position;
      playing = codec;
    });
    audio.addEventListener("timeupdate", () => {
      if (playing === codec && !audio.paused) position = audio.currentTime;
    });
    audio.addEventListener("ended", () => (position = 0));
    const picture = element("img", {
      src: source(example, name, "img"),
      alt: `spectrogram: ${words(version)}`,
    });
    return element("figure", {}, picture, audio, caption(version));
  };

  const show = (example, versions) => {
    const before = [...panes.querySelectorAll("audio")].find((audio) => !audio.paused);
    if (example.index !== item) position = 0;
    item = example.index;
    const heard = before ? playing : null;
    before?.pause();
    playing = null;
    panes.replaceChildren(...[null, ...versions].map((version) => player(example, version)));
    const place = ["", ...versions.map((version) => version.codec)].indexOf(heard);
    if (heard !== null && place >= 0) panes.querySelectorAll("audio")[place].play();
  };
  matched(show);
};

if (viewer.examples.length) (viewer.medium === "image" ? pictures : sounds)();

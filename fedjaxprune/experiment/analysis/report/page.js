"use strict";
(async () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (name) => root.setAttribute("data-theme", name);
  const theme = () => root.getAttribute("data-theme");
  setTheme(dark.matches ? "dark" : "light");

  // The table as a file.
  const csv = document.getElementById("csv");
  if (csv) csv.onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv.dataset.text], { type: "text/csv" }));
    link.download = "comparison.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // The plotting library and the numbers are packed to keep the page small.
  const unpack = async (id) => {
    const text = atob(document.getElementById(id).textContent);
    const packed = new Uint8Array(text.length);
    for (let n = 0; n < text.length; n++) packed[n] = text.charCodeAt(n);
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const rest = () => new Promise((done) => setTimeout(done)); // the browser may show what there is
  const plots = [...document.querySelectorAll(".plot")];
  const say = (place, text) => { place.innerHTML = ""; place.append(Object.assign(document.createElement("p"), { className: "error", textContent: text })); };
  await rest();
  try {
    const library = document.createElement("script");
    library.textContent = await unpack("library");
    document.head.append(library);
  } catch (error) {
    plots.forEach((place) => say(place, "This browser cannot unpack the pictures (" + error + "); one from 2023 or later can."));
    return;
  }

  const { palette, pictures } = JSON.parse(await unpack("pictures"));
  const rgb = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16)).join(",");
  const recolor = (text) => {
    if (theme() === "light") return text;
    palette.light.forEach((color, n) => {
      text = text.replaceAll(color, palette.dark[n]).replaceAll("rgba(" + rgb(color) + ",", "rgba(" + rgb(palette.dark[n]) + ",");
    });
    return text;
  };
  const wrap = (name, fits) => {
    const lines = [""];
    const parts = name.split(/(?<=, )/).flatMap((part) => (part.length > fits ? part.split(/(?<= )/) : [part]));
    for (const word of parts) {
      if (lines.at(-1) && (lines.at(-1) + word.trimEnd()).length > fits) lines.push("");
      lines[lines.length - 1] += word;
    }
    return lines.map((line) => line.trimEnd());
  };
  const frame = (figure, place, picture) => {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue("--" + name).trim();
    const narrow = place.clientWidth < 480;
    const layout = figure.layout;
    const shown = figure.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap" && trace.name);
    const fits = Math.floor((place.clientWidth - 60) / 6.5); // letters beside a line of the legend
    const lines = shown.map((trace) => wrap(trace.name, fits));
    shown.forEach((trace, n) => { trace.name = lines[n].join("<br>"); });
    const longest = Math.max(0, ...lines.flat().map((text) => text.length));
    const perRow = Math.max(1, Math.floor(place.clientWidth / (55 + 7 * longest)));
    let below = 0; // what the legend takes
    for (let n = 0; shown.length > 1 && n < lines.length; n += perRow) {
      below += 6 + 15 * Math.max(...lines.slice(n, n + perRow).map((several) => several.length));
    }
    const bars = figure.data.filter((trace) => trace.orientation === "h");
    if (bars.length) { // names beside the bars, which are as high as their names
      const names = bars[0].y.map((name) => wrap(name, Math.floor(place.clientWidth / 16)));
      bars.forEach((trace) => { trace.y = names.map((several) => several.join("<br>")); });
      layout.height = 150 + names.length * Math.max(34, 8 + 15 * Math.max(...names.map((several) => several.length)));
    }
    Object.assign(layout, {
      width: place.clientWidth,
      height: (layout.height || (narrow ? 300 : 360)) + below,
      font: { family: "system-ui, sans-serif", size: narrow ? 11 : 12, color: of("text") },
      paper_bgcolor: of("card"), plot_bgcolor: of("card"),
      margin: { l: 10, r: 16, b: 10, t: 46, ...layout.margin },
      hoverlabel: { bgcolor: of("shade"), bordercolor: of("line"), font: { color: of("text") }, namelength: -1 },
      legend: { orientation: "h", x: 0, xref: "container", xanchor: "left", y: 0, yref: "container", yanchor: "bottom", maxheight: 1, tracegroupgap: 0, traceorder: "normal" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: of("quiet"), activecolor: of("text") },
      showlegend: shown.length > 1, dragmode: narrow ? false : "zoom", hovermode: "closest",
    });
    layout.margin.b = 12;
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = { ...layout[axis], gridcolor: of("line"), linecolor: of("line"), zerolinecolor: of("line"), zeroline: false, showline: axis === "xaxis", ticklabeloverflow: "allow", tickcolor: of("line"), ticks: "outside", ticklen: 4 };
    }
    figure.config = {
      displaylogo: false, scrollZoom: false, showSendToCloud: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "png", scale: 2, filename: picture.key },
    };
    return figure;
  };
  const draw = (place) => {
    const picture = pictures[place.dataset.number];
    const figure = frame(JSON.parse(recolor(picture.variants[place.dataset.variant || 0])), place, picture);
    return Plotly.react(place, figure.data, figure.layout, figure.config);
  };
  const choose = (place, variant, buttons) => {
    place.dataset.variant = variant;
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", n === variant));
    return draw(place);
  };
  for (const place of plots) {
    const names = pictures[place.dataset.number].names;
    const choices = place.parentElement.querySelector(".choices");
    if (names.length > 4) {
      const select = document.createElement("select");
      select.setAttribute("aria-label", "what is shown");
      names.forEach((name, n) => select.append(new Option(name, n)));
      select.onchange = () => choose(place, +select.value, []);
      choices.append(select);
    } else if (names.length > 1) {
      const buttons = names.map((name) => Object.assign(document.createElement("button"), { type: "button", textContent: name }));
      buttons.forEach((button, n) => { button.onclick = () => choose(place, n, buttons); });
      choices.append(...buttons);
      buttons[0].setAttribute("aria-pressed", "true");
    }
  }
  const mark = (name) => root.setAttribute("data-" + name, Math.round(performance.now())); // ms since the page was opened
  // What is on the screen comes first, then what is nearest to it, wherever it has been scrolled to.
  const away = (place) => {
    const box = place.getBoundingClientRect();
    return Math.max(0, box.top - innerHeight, -box.bottom);
  };
  for (const left = [...plots]; left.length; ) {
    await rest();
    const distances = left.map(away);
    const nearest = Math.min(...distances);
    if (nearest > 0 && !root.hasAttribute("data-shown")) mark("shown");
    const [place] = left.splice(distances.indexOf(nearest), 1);
    try {
      await draw(place);
    } catch (error) {
      say(place, "This picture cannot be drawn: " + error);
      console.error(error);
    }
  }
  mark("drawn");
  let turned;
  onresize = () => {
    clearTimeout(turned);
    turned = setTimeout(() => plots.filter((place) => place.layout && place.layout.width !== place.clientWidth).forEach(draw), 150);
  };
  onresize(); // it may have been turned while it was drawn
  const redraw = () => plots.forEach(draw);
  document.getElementById("theme").onclick = () => { setTheme(theme() === "dark" ? "light" : "dark"); redraw(); };
  dark.onchange = () => { setTheme(dark.matches ? "dark" : "light"); redraw(); };
})();
